"""What several tests share; nothing here is collected by pytest."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]  # of the checkout
