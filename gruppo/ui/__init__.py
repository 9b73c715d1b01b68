"""The dashboard: pages over run folders. It reads them through `gruppo.runs` alone."""
