"""How prompts and responses become rows of tokens; nothing here knows a loss or a rank."""
