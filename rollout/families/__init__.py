"""How does this model family work?"""
