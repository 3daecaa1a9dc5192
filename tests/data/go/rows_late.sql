-- The same rows' columns that came by ALTER; only for the newest Go schema.
UPDATE tasks SET question_json = '{"text":"Which one?","options":["a","b"]}', interactions_json = '[{"question_text":"Which one?"}]', project = 'shop', story_id = 'story-1', summary = 'half done' WHERE name = 'blocked';
UPDATE tasks SET question_json = 'What now?' WHERE name = 'blocked in words';
UPDATE tasks SET rejection_comment = 'not yet', acceptance_criteria = 'it works', checker_report = 'pass' WHERE name = 'completed';
UPDATE executions SET session_id = '5e550000-cccc-4000-8000-000000000001', sandbox_dir = '/tmp/claudomator-sandbox-1' WHERE status = 'BLOCKED';
UPDATE executions SET changestats_json = '{"files_changed":5,"lines_added":127,"lines_removed":43}', commits_json = '[{"hash":"68399a5","message":"merge"}]', tokens_in = 100, tokens_out = 50 WHERE status = 'COMPLETED';
UPDATE executions SET tokens_in = 0, tokens_out = 0 WHERE status <> 'COMPLETED';
UPDATE tasks SET "of another" = 'kept' WHERE name = 'queued';
