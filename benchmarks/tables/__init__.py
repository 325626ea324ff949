"""Stored rows as Markdown tables: what report, README and docs show."""
