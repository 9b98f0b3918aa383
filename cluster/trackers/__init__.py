"""Who is told about a step?"""
