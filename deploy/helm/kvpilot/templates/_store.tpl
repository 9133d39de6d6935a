{{/* The job store: how processes find it, and the names of its queues. */}}

{{- define "kvpilot.redis.host" -}}
{{ include "kvpilot.fullname" . }}-redis
{{- end -}}

{{/* Environment that gives a process its REDIS_URL setting. Takes a list: root, the setting's prefix. */}}
{{- define "kvpilot.redis.env" -}}
{{- $root := index . 0 -}}
{{- $redis := $root.Values.redis -}}
{{- if $redis.urlSecret.name -}}
- name: {{ index . 1 }}REDIS_URL
  valueFrom:
    secretKeyRef: {name: {{ $redis.urlSecret.name | quote }}, key: {{ $redis.urlSecret.key | quote }}}
{{- else if $redis.internal.passwordSecret.name -}}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ $redis.internal.passwordSecret.name | quote }}
      key: {{ $redis.internal.passwordSecret.key | quote }}
- name: {{ index . 1 }}REDIS_URL
  value: redis://:$(REDIS_PASSWORD)@{{ include "kvpilot.redis.host" $root }}:6379/0
{{- else -}}
- name: {{ index . 1 }}REDIS_URL
  value: redis://{{ include "kvpilot.redis.host" $root }}:6379/0
{{- end -}}
{{- end -}}

{{/* Streams of jobs that wait for a model, as a JSON list: one a priority, as protos/kvpilot/bus/keys.py names them. */}}
{{- define "kvpilot.queues" -}}
{{- $base := printf "kvpilot:jobs:%s" . -}}
{{- list $base (printf "%s:high" $base) (printf "%s:low" $base) | toJson -}}
{{- end -}}

{{/* Their consumer group. */}}
{{- define "kvpilot.group" -}}
workers
{{- end -}}
