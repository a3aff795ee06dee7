"""Files of any name, where users put them."""

import os

import pytest

from ssd_jax.core.config import UserError
from ssd_jax.storage import checkpoints, files


def test_a_link_is_written_through(tmp_path):
  """The file on the other disk is replaced; the link stays one."""
  (tmp_path / "disk").mkdir()
  (tmp_path / "x.json").symlink_to(tmp_path / "disk" / "x.json")
  files.write_json(tmp_path / "x.json", [1])
  assert (tmp_path / "x.json").is_symlink()
  assert files.read_json(tmp_path / "disk" / "x.json") == [1]


def test_home_is_found_in_every_path(tmp_path, monkeypatch):
  """~ is the home folder, if there is one."""
  monkeypatch.setenv("HOME", str(tmp_path))
  files.write_json("~/x.json", 1)
  checkpoints.save("~/weights", {"a": checkpoints.np.zeros(2)})
  assert sorted(os.listdir(tmp_path)) == ["weights", "x.json"]
  assert checkpoints.restore("~/weights")["a"].shape == (2,)
  assert str(files.user_path("~nobody-of-this-name/x"))[0] == "~"


def test_names_that_are_no_text_survive_json(tmp_path):
  """Bytes of a file name that are no UTF-8 come back as they were."""
  name = os.fsdecode(b"caf\xe9 \xe4\xb8\xad")
  files.write_json(tmp_path / "x.json", {"data": name})
  assert files.read_json(tmp_path / "x.json") == {"data": name}
  files.write_json(tmp_path / "y.json", ["\u4e2d"])
  assert "\u4e2d" in (tmp_path / "y.json").read_text("utf-8")


def test_without_a_cache_nothing_fails(tmp_path, monkeypatch):
  """No home, or a folder that cannot be made: there is no cache."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
  assert files.cache_folder() == tmp_path / "new" / "ssd_jax"
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  assert files.cache_folder() is None
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setattr(files.os.path, "expanduser", lambda name: name)
  assert files.cache_folder() is None
  assert not list(tmp_path.glob("*~*"))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x80"])
def test_what_is_no_json_is_one_line(tmp_path, text):
  """However it is damaged."""
  (tmp_path / "x.json").write_text(text, "latin-1")
  with pytest.raises(UserError, match="readable JSON"):
    files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("home", ["", "relative"])
def test_without_a_home_there_is_no_cache(tmp_path, monkeypatch, home):
  """Nothing is made in the working directory, such as a folder called ~."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("XDG_CACHE_HOME", home)
  monkeypatch.setattr(os.path, "expanduser", lambda path: path)
  assert files.cache_folder() is None
  assert not os.listdir(tmp_path)


def test_a_path_that_is_no_utf8_is_one_line(tmp_path):
  """Said of a folder of arrays before it is written or read."""
  folder = os.fsdecode(os.fsencode(tmp_path) + b"/w\xe9")
  for use in (lambda: checkpoints.save(folder, {}),
              lambda: checkpoints.restore(folder)):
    with pytest.raises(UserError, match="UTF-8 .*udce9.*Rename"):
      use()
  assert not os.listdir(tmp_path)


def test_links_in_a_circle_are_one_line(tmp_path):
  """As the place of a file or of a folder, on every version of Python."""
  (tmp_path / "a").symlink_to("b")
  (tmp_path / "b").symlink_to("a")
  assert files.storable_folder(tmp_path / "a") == tmp_path / "a"
  with pytest.raises(UserError, match="got (Too many levels|File exists)"):
    files.write_json(tmp_path / "a" / "x.json", 1)
