"""Run folders to tables, pictures and pages; nothing here imports torch."""
