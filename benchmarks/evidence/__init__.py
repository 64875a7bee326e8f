"""Sections of the pages in docs/evidence/, each from one record of benchmarks/results/."""
