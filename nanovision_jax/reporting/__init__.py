"""The report of a family of runs: its blocks, and the pages that they become."""
