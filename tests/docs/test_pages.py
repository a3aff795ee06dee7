"""The pages say what is so: their code runs, their commands exist."""

import importlib.util
import re
import shlex

from absl import flags
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.decoding import registry
from ssd_jax.evaluation import benchmark
from ssd_jax.runtime import sharding
from tests.support import ROOT, bad_inputs

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A fenced block, with the comment before it that says why it is not run.
_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)```", re.S)


def blocks(page):
  """(mark, kind, text) of the fenced blocks of a page."""
  return [m.group("mark", "kind", "text")
          for m in _BLOCK.finditer(page.read_text("utf-8"))]


def commands():
  """(page, arguments) of every `python -m` of ours, in blocks and in lines."""
  found = []
  for page in PAGES:
    text = page.read_text("utf-8")
    texts = [t for _, kind, t in blocks(page) if kind != "python"]
    texts += [t.replace("\n", " ")
              for t in re.findall(r"`(python -m [^`]*)`", text)]
    for part in texts:
      part = part.replace("\\\n", " ")
      for line in re.findall(r"python -m ((?:infer|train)\.[^&\n]*)", part):
        line = line.partition("#")[0].strip()
        if line.count('"') % 2:  # of a command in quotes
          line = line.rstrip('"')
        found.append((page.name, shlex.join(shlex.split(line))))
  return sorted(set(found))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_run_or_marked(page):
  """CI runs the commands of a block, or a comment says why it does not."""
  ci = _joined((ROOT / ".ci" / "run").read_text())
  for mark, kind, text in blocks(page):
    for command in re.findall(
        r"python (?:-m )?(?:infer|train|docs/).*|gcloud .*",
        text.replace("\\\n", " ")):
      assert kind == "python" or mark or _joined(command) in ci, command


def _joined(text):
  return " ".join(text.replace("\\\n", " ").split())


@pytest.mark.parametrize("name", ["extending.md"])
def test_code_of_a_page_runs(name, tmp_path, monkeypatch):
  """The Python of a page runs from top to bottom, in one namespace."""
  monkeypatch.chdir(tmp_path)
  space = {"__name__": "page"}
  for mark, kind, text in blocks(ROOT / "docs" / name):
    if kind == "python" and mark is None:
      exec(compile(text, name, "exec"), space)
  assert (space["exact"].passes >= 1).all()
  assert (space["out"].passes < 64).all() and (tmp_path / "greys.png").is_file()


def test_a_decoder_takes_under_sixty_lines_of_a_file_of_ones_own(tmp_path):
  """The page's decoder is short, and the command line finds it in its file."""
  [text] = [text for _, _, text in blocks(ROOT / "docs" / "extending.md")
            if text.startswith("# copy_above.py")]
  lines = [x for x in text.splitlines() if x.strip()]
  assert len(lines) < 60  # imports and all
  file = tmp_path / "copy_above.py"
  file.write_text(text)
  known = registry.with_file(file)
  decoder = registry.parse("copyabove:ahead=6+least=0.5", known)
  assert (decoder.ahead, decoder.least) == (6, 0.5)
  assert registry.parse("ar", known) == registry.parse("ar")


@pytest.mark.parametrize("text", [None, "1/0", "x = 3"])
def test_a_file_without_decoders_is_one_line(tmp_path, text):
  """A file that is missing, fails or holds none is said in one line."""
  file = tmp_path / "mine.py"
  if text is not None:
    file.write_text(text)
  with pytest.raises(UserError, match="Expected a Python file") as error:
    registry.with_file(file)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("page,line", commands())
def test_commands_of_the_pages_exist(page, line, tmp_path, monkeypatch):
  """Their modules, flags, files, variants, settings and decoders are there."""
  module, *args = shlex.split(line)
  spec = importlib.util.find_spec(module)
  assert spec is not None, module
  name = module.rpartition(".")[2]
  monkeypatch.chdir(ROOT)
  status, said, _ = bad_inputs.feed(name, args, tmp_path, look)
  assert (status, said) == (0, "")


def look():
  """What a command reads of its flags: config, decoders, mesh."""
  flag = {name: flags.FLAGS[name].value for name in flags.FLAGS
          if flags.FLAGS[name].present}
  assert flags.FLAGS.config.family
  for name in {"decoder", "decoders", "loops"} & flag.keys():
    if "decoder_file" not in flag and "$" not in flag[name]:
      benchmark.parse_entries(flag[name], 0)
  if "mesh" in flag:
    sharding.parse(flag["mesh"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_pages_lead_somewhere(page):
  """Files that a page links to or shows are there, and anchors too."""
  text = page.read_text("utf-8")
  for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
    file, _, anchor = link.partition("#")
    target = page.parent / file if file else page
    assert target.exists(), link
    heads = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.M) if (
        anchor) else []
    names = [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-")
             for h in heads]
    assert not anchor or anchor in names, link


def test_every_decoder_has_a_paragraph_that_says_if_it_is_lossless():
  """docs/decoders.md names each decoder, and whether it is lossless."""
  text = (ROOT / "docs" / "decoders.md").read_text("utf-8")
  paragraphs = text.split("\n\n")
  for name in registry.DECODERS:
    own = [i for i, p in enumerate(paragraphs) if f"**`{name}`**" in p]
    assert own, name
    near = " ".join(paragraphs[own[0]:own[0] + 2]).lower()
    assert re.search("lossless|lossy|relaxed|token for token", near) or (
        name == "ar"), name


def test_every_paper_of_the_readme_can_be_cited():
  """The citation file has the papers of README, each with its authors."""
  cited = (ROOT / "CITATION.cff").read_text("utf-8")
  papers = re.findall(r"\d{4}\.\d{5}", (ROOT / "README.md").read_text("utf-8"))
  assert papers and all(f'"arXiv:{paper}"' in cited for paper in papers)
  entries = cited.split("- type: article")[1:]
  assert len(entries) == len(set(papers))
  assert all("family-names:" in entry for entry in entries)


def test_the_table_of_published_models_is_what_its_command_prints():
  """Sizes, memory and passes in docs/models.md follow the code."""
  spec = importlib.util.spec_from_file_location(
      "models_table", ROOT / "docs" / "models_table.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert module.table() in (ROOT / "docs" / "models.md").read_text("utf-8")
