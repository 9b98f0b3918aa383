"""Which networks do the scorers look with?"""
