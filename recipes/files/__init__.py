"""What recipes read and write: their own settings, sources of rows and measured points; knows nothing of models."""
