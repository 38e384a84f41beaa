"""Plugins of other people's training tools, one file a tool: their configuration, translated into the callback."""
