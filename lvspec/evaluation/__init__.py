"""Methods side by side over a data set on disk: samples, metrics, intervals, and one table."""
