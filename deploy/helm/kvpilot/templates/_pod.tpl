{{/* Parts that pods have in common. */}}

{{- define "kvpilot.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Where and as what a pod runs. Takes a list: root, component, the values with nodeSelector etc., pool's name or none. */}}
{{- define "kvpilot.pod" -}}
{{- $root := index . 0 -}}
{{- $place := index . 2 -}}
{{- $who := list $root (index . 1) -}}
{{- if gt (len .) 3 }}{{ $who = append $who (index . 3) }}{{ end -}}
serviceAccountName: {{ include "kvpilot.serviceAccountName" (list $root (index . 1)) }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- toYaml $root.Values.podSecurityContext | nindent 2 }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with $place.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $place.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with $place.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $place.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $place.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $root.Values.topologySpread.enabled }}
topologySpreadConstraints:
  {{- range $root.Values.topologySpread.topologyKeys }}
  - maxSkew: 1
    topologyKey: {{ . | quote }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "kvpilot.selector" $who | nindent 8 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Settings as environment. Takes a list: prefix, a dictionary of names and values. */}}
{{- define "kvpilot.settings" -}}
{{- $prefix := index . 0 -}}
{{- range $name, $value := index . 1 }}
- name: {{ printf "%s%s" $prefix (upper $name) }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end -}}

{{/* A native gRPC probe of a port and a service of the health protocol. */}}
{{- define "kvpilot.probe" -}}
grpc: {port: {{ index . 0 }}, service: {{ index . 1 | quote }}}
{{- end -}}
