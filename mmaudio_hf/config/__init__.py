"""Recipes: strict, typed settings (`settings`), and reading them from YAML and the command line (`reading`)."""

from mmaudio_hf.config import settings
from mmaudio_hf.config.reading import load_recipe, model_config, read_json, read_json_lines, save_recipe, to_dict
from mmaudio_hf.config.settings import *  # noqa: F403  the list of them is there

__all__ = [*settings.__all__, "load_recipe", "model_config", "read_json", "read_json_lines", "save_recipe", "to_dict"]
