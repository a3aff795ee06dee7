"""LlamaGen's cleaning of captions, rule by rule."""

import pytest

from ssd_jax.families import captions


@pytest.mark.parametrize("caption, cleaned", [
    ("A photo of a Red Cat", "a photo of a red cat"),
    ('a <b>bold</b> dog &amp; "friend"', 'a bold dog "friend"'),
    ("visit https://x.com/a?b=1 or foo.net/bar now", "visit ?b=1 or now"),
    ("by @nick, 漢字 cat – on the mat", "by , cat - on the mat"),
    ("it‘s “fine” (really) [ok] {yes} a|b",
     "it's \"fine\" really ok yes a b"),
    ("pic.jpg IMG_1234.png of a dog... at 3:45 ", "of a dog at 3:45"),
    ("one-two-three-four-five", "one two three four five"),
    ("abc123 a1b2c3 12ab34 jc6640vc 1234567 #12 #123456", ""),
    ("Worldwide Free Shipping free download click here for more page 12",
     "click here for more"),
    ("1920x1080 png images , 5.5х7 key : value end,next x/y",
     "key: value end, next x y"),
    ('"quoted"', "quoted"),
    ("caf%C3%A9+au+lait", "café au lait"),
    ("<person> at 192.168.0.12", "person at"),
    (" . hidden", ". hidden"),
    ("&lt;3 hearts", "<3 hearts"),
])
def test_captions_are_cleaned_as_in_training(caption, cleaned):
  """The text encoder sees what the published cleaning leaves."""
  assert captions.clean(caption) == cleaned
