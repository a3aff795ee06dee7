"""Words that all rooms share: types, settings, errors; runs nothing."""
