"""Pages that show what happened: `lvspec.report`, see README.md beside this file."""
