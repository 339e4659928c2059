"""Online learning: rounds, labelers, the ledger of bought labels, and the service."""
