"""Results as HTML pages, tables and plots."""
