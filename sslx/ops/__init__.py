"""Pure functions of arrays: no modules, no state, no config."""
