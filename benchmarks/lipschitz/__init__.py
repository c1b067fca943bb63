"""How tight are proved bounds of networks that others have trained, and how long do they take?"""
