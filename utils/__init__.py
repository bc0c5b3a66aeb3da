"""Settings, errors, files, device, processes and costs; data and runs are subpackages."""
