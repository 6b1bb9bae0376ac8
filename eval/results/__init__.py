"""Results as long tables: reading and writing, statistics, reports and figures."""
