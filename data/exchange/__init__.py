"""What comes in and goes out: importers, exporters and problem sets."""
