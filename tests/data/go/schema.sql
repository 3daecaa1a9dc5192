-- The Go server's schema as its storage.Open() left it: the first tables, then one ALTER a line, oldest first, so that a
-- test can stop early and have an older database.  Column names: seeds (INSERTs and ALTERs of internal/storage/db.go);
-- constraints: the strictest that its statements allow; "of another" stands for what a fork may have added.
CREATE TABLE tasks (id TEXT PRIMARY KEY, name TEXT NOT NULL, description TEXT, config_json TEXT NOT NULL, priority TEXT NOT NULL, timeout_ns INTEGER NOT NULL, retry_json TEXT NOT NULL, tags_json TEXT NOT NULL, depends_on_json TEXT NOT NULL, parent_task_id TEXT, state TEXT NOT NULL DEFAULT 'PENDING', created_at DATETIME NOT NULL, updated_at DATETIME NOT NULL);
CREATE TABLE executions (id TEXT PRIMARY KEY, task_id TEXT NOT NULL, start_time DATETIME NOT NULL, end_time DATETIME NOT NULL, exit_code INTEGER NOT NULL DEFAULT 0, status TEXT NOT NULL, stdout_path TEXT, stderr_path TEXT, artifact_dir TEXT, cost_usd REAL NOT NULL DEFAULT 0, error_msg TEXT, FOREIGN KEY (task_id) REFERENCES tasks(id));
CREATE INDEX idx_tasks_state ON tasks(state);
CREATE INDEX idx_executions_task_id ON executions(task_id);
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE agent_events (id TEXT PRIMARY KEY, agent TEXT NOT NULL, event TEXT NOT NULL, timestamp DATETIME NOT NULL, until DATETIME, reason TEXT);
CREATE TABLE projects (id TEXT PRIMARY KEY, name TEXT NOT NULL, remote_url TEXT);
ALTER TABLE tasks ADD COLUMN "of another" TEXT;
ALTER TABLE tasks ADD COLUMN rejection_comment TEXT;
ALTER TABLE tasks ADD COLUMN question_json TEXT;
ALTER TABLE executions ADD COLUMN session_id TEXT;
ALTER TABLE executions ADD COLUMN sandbox_dir TEXT;
ALTER TABLE tasks ADD COLUMN summary TEXT;
ALTER TABLE tasks ADD COLUMN interactions_json TEXT;
ALTER TABLE executions ADD COLUMN changestats_json TEXT;
ALTER TABLE executions ADD COLUMN commits_json TEXT;
ALTER TABLE tasks ADD COLUMN elaboration_input TEXT;
ALTER TABLE tasks ADD COLUMN project TEXT;
ALTER TABLE tasks ADD COLUMN story_id TEXT;
ALTER TABLE tasks ADD COLUMN acceptance_criteria TEXT NOT NULL DEFAULT '';
ALTER TABLE tasks ADD COLUMN checker_for_task_id TEXT NOT NULL DEFAULT '';
ALTER TABLE tasks ADD COLUMN checker_report TEXT NOT NULL DEFAULT '';
ALTER TABLE executions ADD COLUMN tokens_in INTEGER;
ALTER TABLE executions ADD COLUMN tokens_out INTEGER;
