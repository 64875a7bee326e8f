"""What lies on disk: bundles, engine folders, results, and how they are written."""
