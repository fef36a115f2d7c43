-- Several conductors share the work: what only one of them may do at a time, and who is to publish a notification.

CREATE TABLE leases (
    name TEXT PRIMARY KEY,
    holder TEXT NOT NULL              -- a conductor; one that is not registered any more holds nothing
);

ALTER TABLE notifications ADD COLUMN owner TEXT NOT NULL DEFAULT '';  -- the conductor that publishes it
CREATE INDEX notifications_by_owner ON notifications (owner, id);
