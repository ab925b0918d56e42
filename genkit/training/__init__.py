"""The run that every recipe shares: settings, folder, checkpoints, resume, log."""
