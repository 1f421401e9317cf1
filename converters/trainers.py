"""Trainers whose parameters are known by their names: the tables that make them canonical."""

from types import ModuleType

from converters import maxtext, tunix

# Each has FAMILIES (model types), EMBEDDING (the name that tells the layout) and rules(ModelConfig's arguments).
TRAINERS: dict[str, ModuleType] = {"MaxText": maxtext, "Tunix": tunix}
