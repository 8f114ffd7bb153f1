"""What every layer knows: types, errors, config, units, clock, log, metrics. Imports nothing of ours."""
