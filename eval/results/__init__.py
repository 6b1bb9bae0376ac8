"""Results as tables of rows: reading, writing, statistics, reports and figures."""
