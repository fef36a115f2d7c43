-- The host to which a live migration may have brought the guest already, until it is known on which of the two it is.

ALTER TABLE instances ADD COLUMN maybe_on TEXT;
CREATE INDEX instances_by_maybe_on ON instances (maybe_on) WHERE maybe_on IS NOT NULL;

-- An attachment besides which nobody else may write to the volume, although it can be shared: 0 or 1.
ALTER TABLE volume_attachments ADD COLUMN alone INTEGER NOT NULL DEFAULT 0;
