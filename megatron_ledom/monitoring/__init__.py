"""Watch runs: the heartbeat of a run, the status of run folders, and alerts. It imports no torch and writes only the heartbeat."""
