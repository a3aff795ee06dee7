"""Writes what each command answers to bad input: errors.txt beside this file.

    python -m tests.golden.make_errors

Read the difference before you commit it: these lines are what users see.
"""

import os
import pathlib
import tempfile

from tests.support import ROOT, bad_inputs

FILE = pathlib.Path(__file__).with_name("errors.txt")


def main():
  """Feeds all cases and writes a line each: command, case, answer."""
  os.chdir(ROOT)
  lines = []
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    bad_inputs.make_files(folder)
    for command, what, args in bad_inputs.cases():
      _, error, _ = bad_inputs.feed(command, args, folder)
      said = error.strip().replace(str(folder), "DIR").replace("\n", " ")
      lines.append(f"{command}\t{what}\t{said}\n")
  FILE.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
  main()
