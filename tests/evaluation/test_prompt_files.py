"""Official prompt files are read, images laid out as scorers read them."""

import json
import re

import numpy as np
from PIL import Image
import pytest

from ssd_jax.core.config import UserError
from ssd_jax.evaluation import prompt_files
from ssd_jax.evaluation.prompt_files import Item

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}],
     "prompt": "a photo of a bench"},
    {"tag": "colors", "include": [], "prompt": "a photo of a red cow"},
]


def write(path, text):
  path.write_text(text, "utf-8")
  return path


def pictures(count, first=0):
  """`count` images of one grey each."""
  return [np.full((8, 8, 3), first + i, np.uint8) for i in range(count)]


def test_reads_every_prompt_file(tmp_path):
  """Text, GenEval, COCO, PartiPrompts and DPG-Bench's folder, in order."""
  text = write(tmp_path / "p.txt", "red heart\n\n 漢字 \n")
  assert [x.prompt for x in prompt_files.read_prompts(text)] == [
      "red heart", " 漢字 "]
  lines = "\n".join(map(json.dumps, GENEVAL)) + "\n"
  items = prompt_files.read_prompts(write(tmp_path / "g.jsonl", lines))
  assert [x.name for x in items] == ["00000", "00001"]
  assert items[1].metadata == GENEVAL[1]
  coco = {"images": [], "annotations": [
      {"image_id": 9, "id": 3, "caption": "second"},
      {"image_id": 9, "id": 1, "caption": "A dog.\n"},
      {"image_id": 2, "id": 2, "caption": "A cat."}]}
  items = prompt_files.read_prompts(
    write(tmp_path / "c.json", json.dumps(coco))
  )
  assert [x.prompt for x in items] == ["A cat.", "A dog."]
  parti = 'Prompt\tCategory\tChallenge\tNote\na "STOP" sign\tSigns\tBasic\t\n'
  items = prompt_files.read_prompts(write(tmp_path / "P.tsv", parti))
  assert [x.prompt for x in items] == ['a "STOP" sign']
  folder = tmp_path / "prompts"
  folder.mkdir()
  for name in ("10", "9", "COCOval_1"):
    write(folder / f"{name}.txt", f"prompt {name}\n")
  items = prompt_files.read_prompts(folder)
  assert [x.name for x in items] == ["9", "10", "COCOval_1"]
  assert items[0].prompt == "prompt 9"


@pytest.mark.parametrize("name,text", [
    ("a.txt", "\n"), ("a.jsonl", "{"), ("a.jsonl", '{"text": 1}'),
    ("a.json", "[]"), ("a.json", "{}"), ("a.tsv", "Name\nx\n"),
    ("a.csv", "a red heart\na cat, asleep\n"),
    ("a.csv", "prompt\na cat, asleep\n"),
    ("a.csv", 'prompt\n"a cat\n'), ("a.csv", "prompt,n\n,3\n"), ("a.csv", ""),
    ("a.tsv", "Prompt\tCategory\nx\ty\tz\n"), ("a.tsv", "Prompt\tNote\n\ta\n"),
    ("a.jsonl", '{"prompt": "\\ud800"}'), ("a.jsonl", "[" * 100_000),
])
def test_other_files_end_in_one_line(tmp_path, name, text):
  """A file that is not what its name says is the user's mistake."""
  with pytest.raises(UserError, match="Expected .*got") as error:
    prompt_files.read_prompts(write(tmp_path / name, text))
  assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="unreadable"):
    prompt_files.read_prompts(tmp_path / "missing")


@pytest.mark.parametrize("name, text", [
    ("a.json", '["red", "a cat"]'), ("a.jsonl", '"red"\n\n"a cat"\n'),
    ("a.json", '[{"prompt": "red"}, {"id": 3, "prompt": "a cat"}]')])
def test_texts_in_json_are_prompts(tmp_path, name, text):
  """Lists and lines of texts mean one thing."""
  items = prompt_files.read_prompts(write(tmp_path / name, text))
  assert [item.prompt for item in items] == ["red", "a cat"]


@pytest.mark.parametrize("name, text, said", [
    ("a.json", '["red", 3]', 'entry 2 has no text as its "prompt"'),
    ("a.json", '{"x": 1}', 'neither a list nor has it "annotations"'),
    ("a.csv", "id;prompt\n1;red\n", "no commas between the columns"),
    ("a.tsv", "id,prompt\n1,red\n", "no tabs between the columns"),
])
def test_the_fault_is_named_as_users_see_it(tmp_path, name, text, said):
  """Not as Python's name of an exception about types."""
  with pytest.raises(UserError, match=re.escape(said)):
    prompt_files.read_prompts(write(tmp_path / name, text))


@pytest.mark.parametrize("name, text", [
    ("a.csv", 'id,Prompt\n1,"a ""STOP"" sign, red"\n\n2,a cat,\n'),
    ("b.CSV", '\ufeffcaption\r\n"a ""STOP"" sign, red"\r\na cat\r\n'),
    ("c.tsv", 'prompt\ta\na "STOP" sign, red\t1\na cat\n')])
def test_tables_have_a_header_and_a_column(tmp_path, name, text):
  """The header is no prompt, and commas within quotes are text."""
  items = prompt_files.read_prompts(write(tmp_path / name, text))
  assert [x.prompt for x in items] == ['a "STOP" sign, red', "a cat"]


def test_a_folder_of_prompts_is_read_whole(tmp_path):
  """Whatever the case of the suffix; empty files are named."""
  write(tmp_path / "1.TXT", "one")
  write(tmp_path / "2.txt", "two")
  (tmp_path / "._2.txt").write_bytes(b"\0\5\x16\7\xff")  # macOS
  items = prompt_files.read_prompts(tmp_path)
  assert [x.prompt for x in items] == ["one", "two"]
  write(tmp_path / "3.txt", " \n")
  with pytest.raises(UserError, match="none in .*3.txt"):
    prompt_files.read_prompts(tmp_path)


def test_geneval_layout_is_what_its_scorer_walks(tmp_path):
  """Folders of digits with metadata.jsonl and numbered samples, no more."""
  items = [Item(row["prompt"], f"{i:05d}", row)
           for i, row in enumerate(GENEVAL)]
  prompt_files.export(
      "geneval", tmp_path, [Item("x", "00007", GENEVAL[0])], pictures(5))
  prompt_files.export("geneval", tmp_path, items, pictures(4) + pictures(4, 10))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["00000", "00001"]
  folder = tmp_path / "00001"
  assert sorted(p.name for p in folder.iterdir()) == [
      "metadata.jsonl", "samples"]
  assert json.loads((folder / "metadata.jsonl").read_text()) == GENEVAL[1]
  names = sorted(p.name for p in (folder / "samples").iterdir())
  assert names == ["0000.png", "0001.png", "0002.png", "0003.png"]
  assert all(re.match(r"\d+\.png", name) for name in names)
  assert np.asarray(Image.open(folder / "samples" / "0002.png"))[0, 0, 0] == 12


def test_dpg_grid_is_cut_apart_without_loss(tmp_path):
  """Crops of the grid, as the scorer takes them, are the four images."""
  prompt_files.export("dpg", tmp_path, [Item("y", "9")], pictures(4))
  prompt_files.export("dpg", tmp_path, [Item("x", "256")], pictures(4))
  assert [p.name for p in tmp_path.iterdir()] == ["256.png"]
  grid = Image.open(tmp_path / "256.png")
  side = grid.width // 2
  corners = [(0, 0), (side, 0), (0, side), (side, side)]
  for shade, (left, top) in enumerate(corners):
    crop = np.asarray(grid.crop((left, top, left + side, top + side)))
    np.testing.assert_array_equal(crop, np.full((8, 8, 3), shade))


def test_exports_ask_for_what_the_scorer_needs():
  """Other prompts or numbers of images are refused before any work."""
  with pytest.raises(UserError, match="evaluation_metadata.jsonl"):
    prompt_files.check_exportable("geneval", [Item("a cat", "00000")], 4)
  with pytest.raises(UserError, match="--num_images 4"):
    prompt_files.check_exportable("dpg", [Item("a cat", "1")], 1)
