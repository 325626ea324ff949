"""Stored rows as Markdown tables: what the report and the README show."""
