{{/* Names, labels, images. */}}

{{- define "kvpilot.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 32 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 32 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 32 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that select a component's pods; they never change. Takes a list: root, component, and a pool's name or none. */}}
{{- define "kvpilot.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- if gt (len .) 2 }}
kvpilot.io/pool: {{ index . 2 }}
{{- end }}
{{- end -}}

{{- define "kvpilot.labels" -}}
{{- $root := index . 0 -}}
{{ include "kvpilot.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: kvpilot
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of pods: without the chart's version, or each upgrade would restart pods that have not changed. */}}
{{- define "kvpilot.podLabels" -}}
{{- $root := index . 0 -}}
{{ include "kvpilot.selector" . }}
app.kubernetes.io/part-of: kvpilot
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* An image of ours. Takes a list: root, key below `image`, what is appended to the tag, digest or none. */}}
{{- define "kvpilot.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.image (index . 1) -}}
{{- $base := printf "%s/%s" $root.Values.image.registry $image.name -}}
{{- if index . 3 -}}
{{- printf "%s@%s" $base (index . 3) -}}
{{- else -}}
{{- printf "%s:%s%s" $base (default $root.Chart.AppVersion $image.tag) (index . 2) -}}
{{- end -}}
{{- end -}}

{{- define "kvpilot.serviceAccountName" -}}
{{- $root := index . 0 -}}
{{- if $root.Values.serviceAccount.create -}}
{{- printf "%s-%s" (include "kvpilot.fullname" $root) (index . 1) -}}
{{- else -}}
default
{{- end -}}
{{- end -}}
