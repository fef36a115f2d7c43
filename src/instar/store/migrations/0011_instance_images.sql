-- Images that operations on instances make: of which instance. Not a property, for those are its owner's to write.

ALTER TABLE images ADD COLUMN instance_id TEXT;  -- NULL for what users made themselves
CREATE INDEX images_by_instance ON images (instance_id, deleted_at);
