"""The vendored emoji are what the vendoring script writes."""

from ssd_jax.data import sources, vendor_emoji


def test_vendored_groups_are_those_of_the_script():
  """Base and group in captions.json are what the vendoring script gives."""
  for emoji in sources.emoji_records():
    assert emoji.base == vendor_emoji.base_of(emoji.code)
    assert emoji.group == vendor_emoji.group_of(emoji.code)
