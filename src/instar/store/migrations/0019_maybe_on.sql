-- The host to which a live migration may have brought the guest already, until it is known on which of the two it is.

ALTER TABLE instances ADD COLUMN maybe_on TEXT;
CREATE INDEX instances_by_maybe_on ON instances (maybe_on) WHERE maybe_on IS NOT NULL;
