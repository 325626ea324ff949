"""Canaries: small fixed runs, kept beside the rows of tables, which tell whether these would come out otherwise now."""
