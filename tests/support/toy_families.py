"""Settings of every published family at toy size."""

from ssd_jax.families import (
  anole,
  emu3,
  emu3_5,
  glm_image,
  janus,
  liquid,
  llamagen,
  lumina,
  lumina2,
  simplear,
)
from tests.support.toy_weights import CODES, shrink_trunk, shrink_vq

_IDS = dict(first_code=4, end_of_row=40, image=37, end_of_turn=41, size=42)


def lumina_config():
  config = lumina.get_config("768")
  config.target_size, config.size = 64, "96x32"  # 2 x 6 cells
  config.ids.update(**_IDS)
  shrink_trunk(config, 96)
  shrink_vq(config, levels=5)
  return config


def anole_config(layout):
  config = anole.get_config(layout)
  config.side = 4
  config.ids.update(**_IDS)
  shrink_trunk(config, 96)
  shrink_vq(config)
  return config


def janus_config():
  config = janus.get_config("1b")
  config.side = 4
  shrink_trunk(config, 64 + CODES)
  shrink_vq(config)
  return config


def emu3_config():
  config = emu3.get_config("3:2")
  config.area = 6 * 4 * 4  # 2 x 3 cells of 4 px
  config.ids.update(specials=260, start=300, end_of_row=301, image=302,
                    begin_of_image=303, first_code=304)
  config.suffix, config.negative = " in the rain", "blue dog"
  shrink_trunk(config, 304 + CODES, kv=2)
  shrink_vq(config, levels=3, dim=4, z=4)
  return config


def emu3_5_config():
  config = emu3_5.get_config("2x3")
  config.ids.update(specials=260, start=300, end_of_row=301, image=302,
                    begin_of_image=303, begin_of_answer=299, end_of_image=298,
                    first_code=304)
  config.source_area = 12 * 8  # 2 px per token
  shrink_trunk(config, 304 + CODES, kv=2)
  config.trunk.head_dim = 24
  shrink_vq(config, levels=2)
  return config


def glm_image_config():
  config = glm_image.get_config()
  config.size, config.preview_side = "96x64", 2  # 1 x 2, then 2 x 3 tokens
  config.head_rows, config.sections = CODES + 8, (1, 1, 2)
  config.ids.start = CODES
  shrink_trunk(config, CODES + 80, kv=2)
  return config


def lumina2_config():
  config = lumina2.get_config()
  config.size = "32x32"  # 4 x 4 tokens
  config.ids.update(first_code=60, end_of_row=40, image=37)
  shrink_trunk(config, 96)
  shrink_vq(config, levels=4, dim=4, z=4)
  return config


def simplear_config():
  config = simplear.get_config()
  config.side, config.first_added = 2, 57
  config.prefix, config.negative = "in the rain ", "blue dog"
  shrink_trunk(config, 64 + CODES, kv=2)
  shrink_vq(config, levels=3, dim=2)
  config.vq.levels = (8, 4)
  return config


def liquid_config():
  config = liquid.get_config()
  config.side = 3
  shrink_trunk(config, 64 + CODES)
  config.trunk.head_dim = 24
  shrink_vq(config)
  return config


def llamagen_class_config():
  config = llamagen.get_config("c2i_B_256_ds8")
  config.classes, config.side = 10, 4
  shrink_trunk(config, 11 + CODES)
  shrink_vq(config)
  config.vq.update(ch_mult=(1, 2, 2, 4), attn_levels=(3,))
  return config


def llamagen_text_config():
  config = llamagen.get_config("t2i_XL_256")
  config.side = 4
  shrink_trunk(config, CODES)
  config.trunk.update(caption_dim=32, caption_slots=12)
  config.t5.update(d_model=32, n_layers=2, n_heads=4, head_dim=8, d_ff=48,
                   vocab=64)
  shrink_vq(config)
  return config


CONFIGS = {
    "lumina": lumina_config,
    "anole": lambda: anole_config("native"),
    "anole_hf": lambda: anole_config("hf"),
    "janus": janus_config,
    "emu3": emu3_config,
    "emu3_5": emu3_5_config,
    "lumina2": lumina2_config,
    "simplear": simplear_config,
    "liquid": liquid_config,
    "llamagen_class": llamagen_class_config,
    "llamagen_text": llamagen_text_config,
}
