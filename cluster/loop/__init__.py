"""How is a step made?"""
