"""Files and folders that several processes, kills and full disks meet: locks of outputs, whole files, JSON without NaN."""
