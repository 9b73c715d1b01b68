"""The dashboard: pages about run folders, served to a browser or written to one file.

It reads run folders and writes nothing into them. Its caches are elsewhere.
"""
