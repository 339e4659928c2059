"""Files and hub sets to records; nothing here knows a token or a tensor."""
