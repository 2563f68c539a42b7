"""Typed, documented configuration: dataclasses here, YAML files and key=value overrides read strictly.

Every field is documented by the string below it (meaning, unit, source) and read by code; `tests/test_config.py` holds
all to that. Defaults stand in this folder and nowhere else. Beside it, `machine`: what a process finds around it.
"""
