"""What runs where on Ray?"""
