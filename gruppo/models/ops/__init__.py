"""Operations of the hand-written decoder."""
