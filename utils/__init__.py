"""Settings, errors, files, device, processes and costs; data and runs have rooms of their own."""
